"""The numbers of a method on a command line: --set NAME=VALUE ..., for several commands.

    add_set(parser.add_argument)
    args = parser.parse_args()
    take_settings(args, RetroConfig)                    # args.set is a dict of its fields
    parse_settings(["retrieve=0.04", "by_mass=no"])     # {"retrieve": 0.04, "by_mass": False}
    print(listing())                                    # every name, its default, its meaning
"""
import inspect
import re
from dataclasses import fields

from retroinfer import InputError, RetroConfig

MOST = 2**31        # no count is so large
WORDS = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}


def add_set(add):
    add("--set", metavar="NAME=VALUE", nargs="*", action="append", default=[],
        help="numbers of the method; --set help lists them")


def take_settings(args, kind):
    """Make a dict of the words behind --set, fields of the dataclass `kind`. Of no words, and of
    the word help: list the fields and exit."""
    if any(not words or "help" in words for words in args.set):
        print(listing(kind))
        raise SystemExit
    args.set = parse_settings([word for words in args.set for word in words], kind)


def parse_settings(given, kind=RetroConfig):
    """Fields of a dataclass by name, typed. InputError says what is allowed."""
    kinds, found = {field.name: field.type for field in fields(kind)}, {}
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
    """A number, or True or False. InputError if the value is not of this kind, or too large."""
    try:
        found = WORDS[value.lower()] if kind is bool else kind(value)
    except (KeyError, ValueError):
        wanted = {bool: "yes or no", int: "a whole number", float: "a number"}[kind]
        raise InputError(f"--set {name}={value}: give {wanted}") from None
    if kind is int and not abs(found) < MOST:
        raise InputError(f"--set {name}={value}: give a number below {MOST:,}")
    return found


def listing(kind=RetroConfig):
    """A line for each field: its name, its default, and the comment beside it."""
    source, lines = inspect.getsource(kind), []
    for field in fields(kind):
        meaning = re.search(rf"^ +{field.name}: .*# +(.*)$", source, re.MULTILINE)[1]
        default = field.default
        if field.type is bool:
            default = "yes" if default else "no"
        lines.append(f"{field.name:<14}{default!s:>7}  {meaning}")
    return "\n".join(lines)
