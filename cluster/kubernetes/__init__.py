"""Manifests for KubeRay from a recipe: `render.manifests` puts them together, one module for each kind of thing."""
