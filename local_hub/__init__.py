"""A local Hugging Face Hub on loopback, for rehearsing a push, offline use and tests."""

from local_hub.app import LocalHub as LocalHub
from local_hub.repository import Repository as Repository
