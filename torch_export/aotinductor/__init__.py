"""Everything of this folder that is about AOTInductor packages."""
