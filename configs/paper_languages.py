"""The claims about many languages (Switch, Figures 7 and 8): `paper_tiny` on a mixture with a file for each language.

    python -m experiments.paper figure7 --scale=languages --config.data.source='languages/*.jsonl' \\
      --config.data.split_field=id --resources=CPU=1
    python -m experiments.sweep --config=configs/paper_languages.py --dry_run     # every run

Languages are read in the proportion of their documents to the power 1 / 5, and one vocabulary is made of all. With
`split_field` a page that several languages share is held out in all of them.
"""

from ml_collections import ConfigDict

from configs import paper_tiny


def get_config() -> ConfigDict:
    config = paper_tiny.get_config()
    config.moe.eval_group_size = 0  # a batch of one language in one group would overflow its experts
    config.data.update(parts="file", parts_exponent=0.2, vocab_size=8000)
    return config


def get_sweep() -> list[dict[str, list]]:
    from experiments import claims  # here, as a run has no need of it

    return claims.products("languages")
