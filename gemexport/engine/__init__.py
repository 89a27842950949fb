"""A run as steps in processes: the DAG, the scheduler, what every step is given, and the output folder."""
