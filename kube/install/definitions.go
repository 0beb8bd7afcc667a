package install

import (
	"embed"
	"io/fs"

	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"sigs.k8s.io/yaml"

	"assay.dev"
)

//go:embed crds/*.yaml
var crds embed.FS

// Definitions are the CustomResourceDefinitions of group assay.dev.
func Definitions() ([]*apiextensionsv1.CustomResourceDefinition, error) {
	files, err := fs.Glob(crds, "crds/*.yaml") // sorted
	if err != nil {
		return nil, err
	}
	var list []*apiextensionsv1.CustomResourceDefinition
	for _, name := range files {
		text, err := crds.ReadFile(name)
		if err != nil {
			return nil, err
		}
		d := new(apiextensionsv1.CustomResourceDefinition)
		if err := yaml.UnmarshalStrict(text, d); err != nil {
			return nil, &assay.Error{Kind: assay.Internal, Op: "read " + name, Err: err}
		}
		list = append(list, d)
	}
	return list, nil
}
