"""What a method is."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np

from embpack._native import SearchParams
from embpack.layouts import RowFormat
from embpack.reference import Row


@dataclass(frozen=True)
class Method(ABC):
    """Chooses the clipping range of each row; its fields are its parameters.

    Class attributes:
        name: what users call it.
        kernel: the native search that does the same as ``search``.
        summary: one line on what it does and when to use it.
    """

    name: ClassVar[str]
    kernel: ClassVar[str]
    summary: ClassVar[str]

    @abstractmethod
    def search(self, x: Row, row_format: RowFormat) -> tuple[np.float32, np.float32]:
        """Return the clipping range (xmin, xmax) of the row ``x``, float32 [d]: the specification."""

    def search_params(self) -> SearchParams:
        """The parameters, as the native search takes them."""
        return SearchParams()

    @property
    def spec(self) -> str:
        """Name and parameters, as parse_method reads them."""
        settings = ",".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))
        return f"{self.name}:{settings}" if settings else self.name
