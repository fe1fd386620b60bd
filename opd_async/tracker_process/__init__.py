"""Hand the figures of one run to one tracker, in a process that any Python can run: it needs nothing of this project.

    launcher (`telemetry/trackers.py`) -> lines of JSON on stdin -> TensorBoard, Weights & Biases, MLflow or trackio
                                       <- lines of JSON on stdout: {"lost": text}, {"dead": text}

The packages of trackers may live in an environment of their own (`tracking.python`), so the modules of this room import
the standard library, one another and, each tracker's module inside of its functions, that tracker's package.
"""
