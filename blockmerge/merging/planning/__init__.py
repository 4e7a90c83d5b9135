"""What a merge will be, before a weight is read: recipe → decisions → plan, and what lies beside the weights
of a folder.
"""
