"""What a merge will be, before a weight is read: request → decisions → plan, and how a recipe is written
down.
"""
