"""The personas that the authors released, as an .npz for meta_mapg.py --personas.
    python benchmark/personas_from_pickle.py pretrain_model/IPD-v0 ipd.npz   # <class>/<split> in there"""
import pickle
import sys
from pathlib import Path

import numpy as np

folder, target = map(Path, sys.argv[1:])
arrays = {}
for file in sorted(folder.glob("*/*")):
    tables = pickle.loads(file.read_bytes())  # a pickle runs code: only open what the authors published
    arrays[f"{file.parent.name}_{file.name}"] = np.stack([np.asarray(table) for table in tables])
np.savez(target, **arrays)
