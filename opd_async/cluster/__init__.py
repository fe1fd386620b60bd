"""Processes on hosts: started, watched, restarted within a budget, stopped in order.

What a process is for is not known here.
"""
