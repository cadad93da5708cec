"""How fast monosem is, next to its peers: `python -m benchmarks train` and `python -m benchmarks harvest`.

    __main__.py      the command line
    train.py         a training step: ours and the peers', interleaved
    harvest.py       activations of a language model: ours and the peers', interleaved
    environments.py  a virtual environment for each peer, made on first use
    workers.py       the parent's end of a worker: start one, ask it for a step
    serving.py       the worker's end: hand out batches when asked, time what the loop does with them
    steps.py         (in a worker) the training loops, one function an implementation
    streams.py       (in a worker) the activation pipelines, one function an implementation
    parity.py        ours must be right before they are timed
    roofline.py      what the machine could do at best; peak.cpp measures it
    report.py        rows -> CSV, Markdown, JSON

What runs in a peer's environment (serving, steps, streams) imports only the standard library and torch at the top.
"""
