"""``opd-agents scaling``: success against compute, over runs of several seeds."""
