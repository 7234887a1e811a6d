"""Conversations as the models were trained on them: a table of versions, messages checked, segments of a prompt."""
