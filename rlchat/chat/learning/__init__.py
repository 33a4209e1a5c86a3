"""Learning while chatting: :class:`~rlchat.chat.learning.supervisor.Supervisor` runs rounds of `rlchat learn`.

`rlchat serve --learn` and `rlchat chat --learn` use it. A round is a process of its own; this package starts it, reads
its outcome, and remembers which version is active. It imports nothing that trains.
"""
