"""One training step of the same network in other libraries, each in its own virtual environment.

A peer is a process: ``client`` starts the Python of an environment that ``environments`` made, on one of the scripts
``torch_steps`` and ``tensorflow_steps``. These import nothing of Covey. They build every mode, prove with ``clipping``
that a private mode really clips and really adds noise, and then time blocks of steps when asked (``serve``).

``flower`` is another kind of peer: a federation whose device is measured beside ours (`benchmarks.device_footprint`).
``flower_secagg`` runs Flower's secure aggregation in turns with ours in one process (`benchmarks.secure_aggregation`).

    python = environments.prepare("torch")
    with client.Peer("torch", python) as peer:
        for mode in peer.ready.supported:
            print(mode, peer.time(mode, 40))
"""
