"""Why a model says so: attention maps, their faithfulness, and the figures of both."""
