"""Channels of any network: dependency groups, cutting, saliency, repair in closed form."""
