"""Explanations: attention maps, their faithfulness, and figures of both."""
