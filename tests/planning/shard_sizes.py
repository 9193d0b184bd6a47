"""Prints how many elements of each parameter rank 0 holds under each layout; run by ``test_memory.py``."""

import json
import sys

from composer.utils import dist

from cheaper.compose import load_config
from cheaper.config import DistributedConfig
from cheaper.distributed.processes import join_processes
from cheaper.distributed.sharding import build_mesh
from cheaper.training import build_model

layouts, *recipe = sys.argv[1:]
join_processes()
measured = []
for layout in json.loads(layouts):
    config = load_config(recipe)
    config.distributed = DistributedConfig("x", **layout)
    decoder = build_model(config, build_mesh(config.distributed), weights=None).model
    measured.append({name: parameter.to_local().numel() for name, parameter in decoder.named_parameters()})
if dist.get_global_rank() == 0:
    print(json.dumps(measured))
