"""What a graph computes beside its weights, read from its operators: functions, factors and limits, by layer.

Numbers tell these apart only where a program adds little noise of its own; a graph states them exactly.
"""
