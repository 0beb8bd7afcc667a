package identity

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"

	"assay.dev"
)

// NewToken makes a join token for the root that signs now, and the hash of its
// secret, which is all that is stored. assay.ParseJoinToken reads it.
func NewToken(root []byte) (token assay.JoinToken, hash []byte) {
	var id [8]byte
	rand.Read(id[:]) // never fails (crypto/rand)
	rand.Read(token.Secret[:])
	token.ID = hex.EncodeToString(id[:])
	token.Root = sha256.Sum256(root)
	return token, TokenHash(token)
}

// TokenHash is what is stored of a token's secret. The secret has 256 random
// bits, so a plain hash is enough.
func TokenHash(t assay.JoinToken) []byte {
	sum := sha256.Sum256(append([]byte("assay join token\x00"+t.ID+"\x00"), t.Secret[:]...))
	return sum[:]
}
