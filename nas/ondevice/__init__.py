"""What runs on the device that is measured: models from a bundle, timed in rounds, into one file of results.

Everything here needs Python, NumPy and the runtime that is measured, and nothing else of this package but its errors:
`nas measure --bundle` copies this folder beside the models, and the copy runs where `nas` was never installed. On this
machine the same program is run in a process of its own, so a runtime that crashes takes nothing with it.
"""
