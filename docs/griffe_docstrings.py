"""What mkdocstrings needs to show docstrings in transformers' style; mkdocs.yml names it."""

import re
from typing import Any

import griffe


class TransformersDocstrings(griffe.Extension):
    """Takes the marks of transformers' own builder out of docstrings, and finds the defaults of configurations."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Types of arguments are code anyway, [`Name`] is a link elsewhere alone, and a colon ends no type."""
        if obj.docstring:
            text = re.sub(r"\[`~?([\w.]+)`\]", r"`\1`", obj.docstring.value)
            obj.docstring.value = re.sub(
                r"^( +[\w, ]+ \()(.*`.*)(\):)",
                lambda found: found[1] + found[2].replace("`", "") + found[3],
                text,
                flags=re.M,
            )
            if obj.is_function and obj.returns is not None:
                obj.docstring.value = re.sub(
                    r"(?<=^Returns:\n    )", f"{obj.returns}: ", obj.docstring.value, flags=re.M
                )

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """The fields of a `@strict` class are its arguments, as those of a dataclass are."""
        if "__init__" in cls.members or not any(str(decorator.value) == "strict" for decorator in cls.decorators):
            return
        fields = [member for member in cls.members.values() if member.is_attribute and member.annotation is not None]
        kind = griffe.ParameterKind.keyword_only
        parameters = [griffe.Parameter(field.name, kind=kind, default=field.value) for field in fields]
        cls.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(*parameters), parent=cls))
