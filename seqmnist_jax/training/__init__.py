"""How a run is made: the state and the step, the run put together, the loop, many runs by one command.

Above `data`, `devices`, `models` and `workdir`, whose parts it puts together; below `analysis`.
"""
