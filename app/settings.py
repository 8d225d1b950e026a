"""The numbers of the method on a command line: --set NAME=VALUE ..., for several commands.

    add_set(parser.add_argument)                        # args.set is a dict of RetroConfig's fields
    parse_settings(["retrieve=0.04", "by_mass=no"])     # {"retrieve": 0.04, "by_mass": False}
    print(listing())                                    # every name, its default, its meaning
"""
import argparse
import inspect
import re
from dataclasses import fields

from retroinfer import InputError, RetroConfig

WORDS = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}


class Settings(argparse.Action):
    """Collects the numbers given. With none, or the word help, it prints all of them and exits."""

    def __call__(self, parser, args, given, option=None):
        if not given or "help" in given:
            print(listing())
            parser.exit()
        setattr(args, self.dest, getattr(args, self.dest) | parse_settings(given))


def add_set(add):
    add("--set", metavar="NAME=VALUE", nargs="*", action=Settings, default={},
        help="numbers of the method; --set help lists them")


def parse_settings(given):
    """Fields of RetroConfig by name, typed. InputError says what is allowed."""
    kinds, found = {field.name: field.type for field in fields(RetroConfig)}, {}
    for word in given:
        name, is_given, value = word.partition("=")
        if name not in kinds:
            raise InputError(f"--set does not know {name!r}, it knows {', '.join(kinds)}: "
                             "--set help says what they mean")
        if not is_given:
            raise InputError(f"--set {name} has no value: give {name}=VALUE")
        found[name] = parse_value(name, value, kinds[name])
    return found


def parse_value(name, value, kind):
    """A number, or True or False. InputError if the value is not of this kind."""
    try:
        return WORDS[value.lower()] if kind is bool else kind(value)
    except (KeyError, ValueError):
        wanted = {bool: "yes or no", int: "a whole number", float: "a number"}[kind]
        raise InputError(f"--set {name}={value}: give {wanted}") from None


def listing():
    """A line for each field: its name, its default, and the comment beside it."""
    source, lines = inspect.getsource(RetroConfig), []
    for field in fields(RetroConfig):
        meaning = re.search(rf"^ +{field.name}: .*# +(.*)$", source, re.MULTILINE)[1]
        default = field.default
        if field.type is bool:
            default = "yes" if default else "no"
        lines.append(f"{field.name:<14}{default!s:>7}  {meaning}")
    return "\n".join(lines)
