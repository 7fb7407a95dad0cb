"""Device code, one file per structure that has any. Imported by a structure's plans when they are made, never before."""
