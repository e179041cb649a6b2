"""H2O: keeps heavy hitters, the entries that attention has added up on."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Array

from freqkv_jax.kv.policy import register
from freqkv_jax.kv.scored import ScoredPolicy, attention_sums


@register
@dataclass(frozen=True)
class H2OConfig(ScoredPolicy):
    """Keeps the entries with the most accumulated attention (arXiv 2306.14048), and the recents.

    An entry's score is the attention that it had from every query read since it entered the
    cache, its own included; it goes with the entry from round to round and is not divided by the
    number of queries. So entries that have been there for long stay, as in the paper.

    Departures from the paper. A round frees `chunk` entries at once where the paper evicts one a
    token, so that all prompts, long or short, are read by the same rule. Query heads that share a
    kv head choose together, by their mean. Sinks are always kept (`sink_size=0` is the paper's).
    Positions are slots, as for every policy that it is compared with, not true ones: a score
    then adds up attention that an entry had in several slots. Arguments: see ChoosingPolicy;
    the paper gives half of the cache to recents, which is the default here.
    """

    name: ClassVar[str] = "h2o"
    summary: ClassVar[str] = "keeps the entries with the most accumulated attention"
    keeps: ClassVar[str] = "sinks, heavy hitters, recents"
    source: ClassVar[str] = "arXiv 2306.14048"

    def added(self, q: Array, k: Array, at: Array, taken: Array) -> Array:
        """Every query's attention."""
        return attention_sums(q, k, at, taken)
