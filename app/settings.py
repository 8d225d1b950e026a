"""The numbers of the method as a person gives them: --set NAME=VALUE, for several commands.

    parse_settings(["retrieve=0.04", "outliers=no"])    # {"retrieve": 0.04, "outliers": False}
    print(listing())                                    # every name, its default, its meaning
"""
import inspect
import re
from dataclasses import fields

from retroinfer import RetroConfig

WORDS = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}


def parse_settings(given):
    """Fields of RetroConfig by name, typed. ValueError that says what is allowed."""
    known, found = {field.name: field for field in fields(RetroConfig)}, {}
    for word in given:
        name, _, value = word.partition("=")
        if name not in known:
            raise ValueError(f"--set does not know {name!r}; it knows {', '.join(known)} "
                             "(--set help says what they mean)")
        found[name] = parse_value(name, value, known[name].type)
    return found


def parse_value(name, value, kind):
    """A number, or yes or no."""
    try:
        return WORDS[value.lower()] if kind is bool else kind(value)
    except (KeyError, ValueError):
        wanted = {bool: "yes or no", int: "a whole number", float: "a number"}[kind]
        raise ValueError(f"--set {name}={value}: give {wanted}") from None


def listing():
    """A line for each field: its name, its default, and the comment beside it."""
    source, lines = inspect.getsource(RetroConfig), []
    for field in fields(RetroConfig):
        meaning = re.search(rf"{field.name}: .*# +(.*)", source)[1]
        default = {True: "yes", False: "no"}.get(field.default, field.default) \
            if field.type is bool else field.default
        lines.append(f"{field.name:<14}{default!s:>7}  {meaning}")
    return "\n".join(lines)
