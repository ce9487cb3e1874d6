"""The types of configuration values, as annotations that constructors and the schema share.

A constructor's keyword-only parameters are the keys that its YAML may hold; their annotations, made of these names and of
builtins, are what the values are checked against (see `schema.py`), without importing the module that defines the class.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Auto = Literal["auto"]
Names = Annotated[list[str], Field(min_length=1)]
