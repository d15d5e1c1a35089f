"""What `launch.py` needs: flags, the modes, what people read, signals, settings of the process.

The top of the order: nothing imports it but `launch.py`.
"""
