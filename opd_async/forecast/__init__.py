"""What a topology would take on given devices: step time, memory, the best split (`--plan`).

Arithmetic from shapes and data sheets; nothing is measured or started.
"""
