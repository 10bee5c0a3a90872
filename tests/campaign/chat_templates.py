"""Attack with chat templates.

They raise every exception, loop for ever, multiply text, reach for Python, or are no Jinja.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from tests.campaign.forked import complete
from tests.campaign.material import Material
from tests.campaign.odd_values import damaged, odd_text
from tests.campaign.oracle import Verdict, judge
from tests.helpers.chat_templates import read
from tests.helpers.tiny import CHATML

# Jinja expressions that fail, run long, grow, or look where they should not.
FAILS = ("1 / 0", "1 // 0", "[][5]", "{}['x']", "{}.x.y", "none.x", "none()", "messages[99].content", "5 | int(x='a')", "'a' + 1",
         "1 + 'a'", "'x' * -1", "'x'[9]",
         "'a'.encode('ascii')", "'\\ud83d'", "'é'.encode('ascii')", "'x'.index('y')", "'{0.x}'.format(1)", "'%d' % 'x'", "'%s %s' % 1",
         "[1, 'a'] | sort",
         "[] | first | upper", "[] | max | length", "{} | tojson(indent='x')", "messages | tojson(indent=-5)", "messages | xmlattr",
         "range(10, 5, 0)", "range(10**9)",
         "strftime_now('%')", "strftime_now('\\ud83d')", "strftime_now(5)", "raise_exception('no')", "raise_exception(5)",
         "raise_exception('\\x1b[2J\\nstep 1')",
         "raise_exception(messages)", "undefined_thing", "undefined_thing.x", "undefined_thing()", "messages.append(1)",
         "messages[0].update({})", "messages[0].pop('role')",
         "loop.index", "self.x()", "super()", "caller()", "namespace(5)", "dict(5)", "1e308 * 10 | int", "(1e308 * 10) | int",
         "'9' * 5000 | int", "('9' * 5000) | int",
         "messages | groupby('nope')", "messages | map('nope') | list", "messages | selectattr('x', 'nope') | list",
         "messages | batch(0) | list", "'x' | center(10**7)",
         "'x' | indent(10**6)", "'a' | replace('', 'b' * 99999)", "'x'.zfill(10**8)", "'x'.ljust(10**9)", "'%099999999d' % 1",
         "'{:>99999999}'.format(1)",
         "10 ** 10 ** 8", "2 ** 99999999", "1 << 99", "'x' * 10**10", "[0] * 10**10", "(messages | string) * 10**6",
         "'a'.join(['b' * 10**5] * 10**5)", "lipsum(n=10**5)",
         "cycler()", "joiner(5)()", "[1] | random", "messages | random", "'x' | urlize(trim_url_limit='a')", "[[]] | sum",
         "'a' | wordwrap(0)", "'x' | truncate(-1)",
         "''.__class__", "''.__class__.__mro__[1].__subclasses__()", "messages.__init__.__globals__",
         "cycler.__init__.__globals__.os.popen('id').read()",
         "''|attr('__class__')", "lipsum.__globals__", "'{0.__class__}'.format(1)", "'{x.__class__}'.format_map({'x': 1})",
         "self.__init__.__globals__", "joiner.__init__",
         "messages[0].content.format(messages)", "(1).__class__.__base__", "range.mro()", "tools", "tools[0]", "documents.x",
         "bos_token + 1", "bos_token.x.y", "add_generation_prompt + 'x'")
BODIES = (
    "{{{{ {fails} }}}}", "{{% if {fails} %}}x{{% endif %}}", "{{% for x in {fails} %}}{{{{ x }}}}{{% endfor %}}",
    "{{% set x = {fails} %}}{{{{ x }}}}",
    "{{% if messages | length > 1 %}}{{{{ {fails} }}}}{{% endif %}}",
    "{{% for m in messages %}}{{% if loop.last %}}{{{{ {fails} }}}}{{% endif %}}{{% endfor %}}",
    "{{% generation %}}{{{{ {fails} }}}}{{% endgeneration %}}", "{{% macro f(x) %}}{{{{ {fails} }}}}{{% endmacro %}}{{{{ f(1) }}}}",
)
WHOLE = (
    "", " ", "{{ messages }}", "{{ messages | tojson }}", "x",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "{% set ns = namespace(t='x') %}{% for i in range(60) %}{% set ns.t = ns.t + ns.t %}{% endfor %}{{ ns.t }}",
    "{% set ns = namespace(n=3) %}{% for i in range(99) %}{% set ns.n = ns.n ** 3 %}{% endfor %}{{ ns.n }}", "{% include 'x' %}",
    "{% import '/etc/passwd' as x %}",
    "{% extends 'x' %}", "{% block a %}{{ self.a() }}{% endblock %}", "{% generation %}", "{% endgeneration %}",
    "{% generation %}{% generation %}x{% endgeneration %}{% endgeneration %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", "{% break %}",
    "{% for m in messages %}{% continue %}{% endfor %}", "{% do messages.clear() %}",
    "{% set messages = [] %}{{ messages }}", "{% for m in messages %}{{ m.content[::-1] }}{% endfor %}",
    "{% for m in messages | reverse %}{{ m.role }}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{{ m.content | upper }}{% endfor %}", "{% for m in messages %}{{ m.content * 1000 }}{% endfor %}",
    "{% for m in messages %}{{ loop.index }}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content * 99999 }}{% endgeneration %}{% endfor %}", "{% call f() %}{% endcall %}",
    "{% filter upper %}{{ messages }}{% endfilter %}",
    "{% raw %}{{ messages }}", "{# open", "{% for m in recursive %}{% endfor %}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}", "{{ '{{' * 10 }}", "{%- -%}", "{{}}", "{% if %}",
    "{% set x %}{{ x }}{% endset %}{{ x }}", "{% autoescape true %}{{ messages }}{% endautoescape %}", "{% trans %}x{% endtrans %}",
    "{{ debug }}{% debug %}", "{% with a=1 %}{{ a }}{% endwith %}",
)


def attack(dice: Random, folder: Path, material: Material) -> Verdict:
    """Train or evaluate with an odd template, given as an option or by the model's folder."""
    template = template_of(dice)
    path = folder / "odd.jinja"
    path.write_bytes(template)
    way = dice.choice(("option", "option", "folder", "evaluate"))
    if way == "option":
        ended = material.dry_run(folder, "--data.chat_template", path,
                                 *dice.choice(((), (), ("--data.on_bad_row", "skip"), ("--data.train_on", "last"))))
    elif way == "folder":
        model = material.copy_of_model(folder / "model")
        (model / "chat_template.jinja").write_bytes(template)
        ended = material.dry_run(folder, "--model.path", model)
    else:
        ended = complete("trainer.evaluate",
                         ["--model.path", material.model, "--data.general", material.items, "--output", "out", "--data.chat_template", path,
                                              "--generation.max_tokens", "2", "--statistics.bootstrap", "100"], folder)
    return judge(ended, quotes_python=True)


def template_of(dice: Random) -> bytes:
    """Return a template: a whole one, a failure in a good one, or a good one that is damaged."""
    kind = dice.choice(("whole", "fails", "fails", "fails", "damaged", "kwargs"))
    if kind == "whole":
        return dice.choice(WHOLE).encode("utf-8", "surrogatepass")
    good = dice.choice((CHATML, read("qwen3")))
    if kind == "damaged":
        return damaged(dice, good.encode())
    if kind == "kwargs":
        return (good + "{{ '" + json.dumps(odd_text(dice)).replace("'", "") + "' }}").encode()
    failing = dice.choice(BODIES).format(fails=dice.choice(FAILS))
    return dice.choice((failing, good + failing, failing + good)).encode()
