"""This project against other trainers of on-policy distillation."""
