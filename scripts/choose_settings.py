#!/usr/bin/env python3
"""Chooses the settings of the cache study by what they did on validation texts.

    python scripts/choose_settings.py results/cache_study_choices SUITE.yaml

reads the results of the suite cache_study_choices and writes the suite cache_study with the
settings that its rule picks: of those whose perplexity is within 0.5 % of the best one's, the
least nats a digit of the pass keys, to two decimals; of equals, the larger chunk, then the least
perplexity. Recents and chunk go in proportion to the cache. Prints every candidate; SUITE.yaml may
be the packaged file itself.
"""

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from freqkv_jax.evals.suite import Suite, find_suite, read_suite
from freqkv_jax.files import write_text
from freqkv_jax.kv.policy import policy_from_dict

CHOICES = "cache_study_choices"
WITHIN = 1.005  # of the best perplexity
SIZES = ("recent_size", "chunk")
BASELINES = ("window", "random", "knorm", "snapkv", "h2o")
KINDS = ("novelty-v0", "novelty", "keydiff", *BASELINES)  # longer names before what begins them
LINE = re.compile(r"^  ([\w.-]+): (\{policy: [^}]*\})", re.MULTILINE)
Settings = dict[str, Any]


def kind(name: str, policy: Settings) -> str | None:
    """The row of the study that a policy is a candidate for, or a variant of."""
    if policy["policy"] != "novelty":
        first = name.split("-")[0]
        return first if first in BASELINES else None
    if "recency" in policy or "shared_heads" in policy:
        return None  # open questions, held against the choice
    if policy.get("value_share") != 0:
        return "novelty"
    return "keydiff" if policy["bands"] == 1 else "novelty-v0"


def variant_of(name: str) -> str | None:
    """The choice that a policy of the study is made with."""
    return next((kind for kind in KINDS if f"{name}-".startswith(f"{kind}-")), None)


def measured(folder: Path, suite: Suite, policy: str) -> tuple[float, float]:
    """Perplexity and nats a digit of one setting."""
    found = []
    for task, key in (("perplexity", "perplexity"), ("needle", "nats_per_digit")):
        # The first run of each task; others are of a few settings, for an open question.
        cell = next(c for c in suite.cells if (c.task.name, c.policy_name) == (task, policy))
        path = folder / f"{cell.name}.json"
        if not path.is_file():
            raise SystemExit(f"{path} is not there: run the suite {CHOICES} to its end")
        found.append(float(json.loads(path.read_text(encoding="utf-8"))[key]))
    return found[0], found[1]


def choose(rows: Mapping[str, tuple[Settings, float, float]]) -> str:
    """The name that the rule picks; of each: its settings, perplexity, nats a digit."""
    best = min(perplexity for _, perplexity, _ in rows.values())
    near = {name: row for name, row in rows.items() if row[1] <= best * WITHIN}

    def order(name: str) -> tuple[float, float, float]:
        settings, perplexity, nats = near[name]
        return round(nats, 2), -policy_from_dict(settings).chunk, perplexity

    return min(near, key=order)


def applied(name: str, policy: Settings, chosen: Settings) -> Settings:
    """A policy of the study with the chosen settings, what makes it a variant kept."""
    share = policy["cache_size"] / chosen["cache_size"]
    own = {k: policy[k] for k in ("policy", "cache_size", "recency", "shared_heads") if k in policy}
    if re.search(r"-Q\d+$", name):
        own["chunk"] = policy["chunk"]
    scaled = {k: int(v * share) if k in SIZES else v for k, v in chosen.items()}
    return scaled | own


def flow(settings: Settings) -> str:
    """A mapping as YAML writes it on one line."""
    items = (f"{key}: {yaml.safe_dump(value).split()[0]}" for key, value in settings.items())
    return f"{{{', '.join(items)}}}"


def main() -> None:
    """Prints the candidates, writes the suite."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("suite", type=Path)
    args = parser.parse_args()
    text, _ = find_suite(CHOICES)
    suite = read_suite(text, CHOICES, {"model": "MODEL"})
    groups: dict[str, dict[str, tuple[Settings, float, float]]] = {}
    for name, policy in yaml.safe_load(text)["policies"].items():
        if (group := kind(name, policy)) is not None:
            groups.setdefault(group, {})[name] = (policy, *measured(args.results, suite, name))
    chosen = {}
    for group, rows in groups.items():
        pick = choose(rows)
        chosen[group] = rows[pick][0]
        for name, (_, perplexity, nats) in sorted(rows.items(), key=lambda row: row[1][1]):
            mark = "<- chosen" if name == pick else ""
            print(f"{group:11} {name:14} {perplexity:8.3f} {nats:7.3f} nats/digit {mark}")

    def line(match: re.Match[str]) -> str:
        name, policy = match[1], yaml.safe_load(match[2])
        variant = variant_of(name)
        if variant is None:
            return match[0]
        return f"  {name}: {flow(applied(name, policy, chosen[variant]))}"

    write_text(args.suite, LINE.sub(line, find_suite("cache_study")[0]))
    print(f"written {args.suite}")


if __name__ == "__main__":
    main()
