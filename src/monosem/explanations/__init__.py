"""Autoencoder -> RUN/explain/: for every latent, how often it fires, where, with which others, and what it votes for.

    entry                       the parts of an explanation, in order, each kept and skipped when it is there
    seen, collect, neighbours   one pass over activations: all latents
    lens                        what their weights vote for
    rules, effects              N2G rules and ablations: as many latents as are asked for
    probing                     which labelled tasks each answers best
    words                       what can be searched
    store                       how the folder is read; it and `words` need no torch

docs/formats.md describes the folder.
"""
