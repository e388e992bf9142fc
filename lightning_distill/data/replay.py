"""placeholder"""
from typing import Any
ReplayDataModule: Any = None
