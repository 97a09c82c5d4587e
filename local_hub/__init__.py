"""A Hugging Face Hub on loopback, to rehearse publishing, for air-gapped use and for tests."""

from local_hub.app import LocalHub as LocalHub
from local_hub.repository import Repository as Repository
