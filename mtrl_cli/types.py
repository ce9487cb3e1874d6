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
Dropped = Annotated[float, Field(ge=0, le=0.9, description="a share from 0 to 0.9")]
Auto = Literal["auto"]
Names = Annotated[list[str], Field(min_length=1)]
# A number above 0, in full or with one of the units that `budget.parse` knows.
Parameters = Annotated[
    PositiveInt | Annotated[str, Field(pattern=r"^([1-9]\d{0,14}(\.\d+)?|0\.\d*[1-9]\d*)[kKMG]$")],
    Field(description="a number of parameters, such as 1700000, 850k, 1.7M or 2G"),
]
