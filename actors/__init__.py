"""The asyncio roles between the engines and the learner; each is a process of its own."""
