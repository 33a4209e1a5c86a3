"""`rlchat learn`: a new version of a chat model from verdicts on its responses, if it passes a gate.

:func:`rlchat.learn.learner.learn` takes a model file and verdicts and returns the outcome. It trains with the stages of
`rlchat fit`; :mod:`rlchat.learn.gate` decides.
"""
