"""Why: what predictions and trials together say of layouts, knobs and neighbours; reads a sweep and changes nothing."""
