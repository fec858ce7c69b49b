"Errors that follow a power law."

import numpy as np

from ftbook.quality.power_law import power_law

sizes = np.array([16, 32, 64, 128, 256, 512, 1024])


def runs(law, noise=0.0, n=sizes, n_seeds=5, seed=0):
    rng = np.random.default_rng(seed)
    return [
        dict(n=int(k), seed=s, score=float(np.clip(1 - power_law(k, *law) + noise * rng.normal(), 0, 1)))
        for k in n
        for s in range(n_seeds)
    ]
