package assay

import (
	"encoding/base64"
	"encoding/hex"
	"errors"
	"strings"
)

// JoinToken lets one host join the mesh. Written, it is
//
//	assay1.<ID>.<secret>.<root>
//
// where ID is 16 hexadecimal digits, and secret and root are 32 bytes each in
// base64url without padding. Root is the SHA-256 of the certificate of control's
// root, so that the host knows control before it trusts anything.
type JoinToken struct {
	ID     string
	Secret [32]byte
	Root   [32]byte
}

const tokenPrefix = "assay1"

// String writes the token; it is a secret.
func (t JoinToken) String() string {
	enc := base64.RawURLEncoding
	return strings.Join([]string{tokenPrefix, t.ID, enc.EncodeToString(t.Secret[:]), enc.EncodeToString(t.Root[:])}, ".")
}

// ParseJoinToken reads a token. Its errors never quote it.
func ParseJoinToken(s string) (JoinToken, error) {
	var t JoinToken
	part := strings.Split(strings.TrimSpace(s), ".")
	if part[0] != tokenPrefix {
		return t, errors.New("join token: does not start with " + tokenPrefix)
	}
	if len(part) != 4 {
		return t, errors.New("join token: is cut short or is more than a token")
	}
	if id, err := hex.DecodeString(part[1]); err != nil || len(id) != 8 || strings.ToLower(part[1]) != part[1] {
		return t, errors.New("join token: its ID is malformed")
	}
	t.ID = part[1]
	for i, to := range [][]byte{t.Secret[:], t.Root[:]} {
		b, err := base64.RawURLEncoding.Strict().DecodeString(part[2+i])
		if err != nil || len(b) != len(to) {
			return JoinToken{}, errors.New("join token: is cut short or altered")
		}
		copy(to, b)
	}
	return t, nil
}
