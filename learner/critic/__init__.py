"""PPO's critic: a model with one number for a head, its loss and its optimizer.

Split and saved like the student.
"""
