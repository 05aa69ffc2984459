"""The date that a chat template prints: a `strftime_now` of its own, for one day.

transformers gives a template the function `strftime_now`, which formats the present moment. It takes no
other function from outside. So the day is put in front of the template as a macro of the same name, which
holds each directive's text for that day, as Python's `strftime` writes it.
"""

import datetime
import functools
import re
import string

# A directive of strftime: flags, a width, a modifier, a letter.
_DIRECTIVE = re.compile(r"%[-_0^#:]*\d*[EO]?[A-Za-z+]")


@functools.lru_cache(maxsize=8)
def with_date(template: str, date: datetime.date) -> str:
    """The template with its `strftime_now` fixed to midnight of a day; itself if it asks for no date.

    Every directive that the template spells is known, with its flags (`%-d`, `%_m`, `%^b`), and every plain
    letter.
    """
    if "strftime_now" not in template:
        return template
    moment = datetime.datetime(date.year, date.month, date.day)
    plain = {f"%{letter}" for letter in string.ascii_letters}
    texts = {}
    for directive in sorted({*_DIRECTIVE.findall(template), *plain}, key=lambda d: (-len(d), d)):
        text = moment.strftime(directive)
        if text != directive:  # an unknown one stays as it is
            texts[directive] = text
    # "%%" is a percent sign, so no directive reaches across one. The line break behind the macro is removed
    # by `trim_blocks`, so that the template begins at the start of a line, as it did.
    return (
        "{%- macro strftime_now(format) %}"
        "{%- for part in format.split('%%') %}"
        "{%- set its = namespace(text=part) %}"
        f"{{%- for directive, text in {texts!r}.items() %}}"
        "{%- set its.text = its.text.replace(directive, text) %}"
        "{%- endfor %}"
        "{{- '' if loop.first else '%' }}{{- its.text }}"
        "{%- endfor %}"
        "{%- endmacro %}\n" + template
    )
