"""Annotations of configuration values, shared by constructors and the schema.

The keyword-only parameters of a constructor are the keys of its YAML. Their annotations consist of these names and builtins, so that
values can be validated without importing the module of the class (see `config/validation.py`).
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
Dropped = Annotated[float, Field(ge=0, le=0.9, description="a fraction from 0 to 0.9")]
Auto = Literal["auto"]
Names = Annotated[list[str], Field(min_length=1)]
# A positive number, optionally with a unit of `parameter_budget.parse`.
Parameters = Annotated[
    PositiveInt | Annotated[str, Field(pattern=r"^([1-9]\d{0,14}(\.\d+)?|0\.\d*[1-9]\d*)[kKMG]$")],
    Field(description="a number of parameters, such as 1700000, 850k, 1.7M or 2G"),
]
