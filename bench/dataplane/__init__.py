"""The data plane alone: rollout actor, teacher actor, intake and coordinator as they are, with null engines."""
