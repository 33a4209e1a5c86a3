"""Real bugs of RLHF code, planted in rlchat at run time to see which of its checks and alarms notices them."""
