package sandbox

// ownArch: this architecture has no older forms.
var ownArch []uint32
