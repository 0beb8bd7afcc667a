# Two commands do all the set-up: `make demo` and `make test`. Everything else is
# optional. `make help` lists the targets.

GO    ?= go
BIN   := $(CURDIR)/bin
TOOLS := $(BIN)/tools
LDFLAGS := -s -w -X main.version=$(shell git describe --tags --always --dirty 2>/dev/null || echo dev)

.PHONY: help
help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

.PHONY: demo
demo: build ## a meshed bank on this machine; Ctrl-C ends it
	$(BIN)/assay demo

.PHONY: build
build: ## bin/assay, bin/assay-proxy and the demo's bin/bank
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/assay ./cmd/assay-proxy
	cd examples/bank && $(GO) build -trimpath -o $(BIN)/bank .

.PHONY: test
test: packages build lint $(TOOLS)/helm ## everything that this machine can run, end-to-end suites too
	cd examples/bank && $(GO) test -race ./...
	$(GO) test -race -timeout 8m $$($(GO) list ./... | grep -v -e /test/ -e /test$$ -e /bench)
	test/e2e.sh

.PHONY: chaos
chaos: ## kill control, agents and proxies under load for two minutes (LENGTH=2m)
	ASSAY_E2E=1 ASSAY_CHAOS=$(or $(LENGTH),2m) $(GO) test -count=1 -v -timeout 30m -run TestChaos ./test/lifecycle

.PHONY: soak
soak: ## every protocol on a bad network, beside clients that misbehave, for half an hour (LENGTH=30m)
	ASSAY_E2E=1 ASSAY_SOAK=$(or $(LENGTH),30m) $(GO) test -count=1 -v -timeout 2h -run TestSoak ./test/soak

.PHONY: test-kubernetes
test-kubernetes: packages $(TOOLS)/helm ## a Kubernetes of our own in this machine, of one node and of three; compiles it the first time (AWAY=10m: without control, and without the API server, for so long)
	ASSAY_E2E=1 ASSAY_KUBERNETES=1 $(if $(AWAY),ASSAY_AWAY=$(AWAY)) $(GO) test -count=1 -v -timeout $(or $(TIMEOUT),$(if $(AWAY),120m,60m)) $(if $(SKIP),-skip '$(SKIP)') ./test/kubernetes/...

CONFORMANCE = docs/conformance/gateway-api-v1.6.3-mesh.yaml

.PHONY: conformance
conformance: packages ## Gateway API's conformance suite, profiles MESH-HTTP and MESH-GRPC, against a cluster of one node; writes the report
	ASSAY_E2E=1 ASSAY_KUBERNETES=1 $(GO) test -count=1 -v -timeout 40m ./test/kubernetes/conformance -report $(CURDIR)/$(CONFORMANCE)

.PHONY: trap
trap: ## the end-to-end suites with proxies that die of a refused system call and show where it came from
	GOFLAGS=-tags=assay_trap test/e2e.sh

.PHONY: test-short
test-short: ## what needs no privileges and no installed servers, in under 3 minutes
	$(GO) test -timeout 4m ./...

.PHONY: packages
packages: ## install the Debian packages that the tests drive (root and apt-get; else says what is missing)
	@test/packages.sh

.PHONY: lint
lint: $(TOOLS)/staticcheck $(TOOLS)/govulncheck ## gofmt, vet, staticcheck, govulncheck where its database can be had
	@out=$$(gofmt -l $$(git ls-files '*.go')); test -z "$$out" || { echo "not gofmt-ed: $$out"; exit 1; }
	$(GO) vet ./...
	$(GO) vet -tags sabotage,assay_trap ./... # saboteurs, and the sandbox that tells
	cd examples/bank && $(GO) vet ./...
	$(TOOLS)/staticcheck ./...
	GOOS=darwin $(GO) vet ./cmd/assay
	@$(TOOLS)/govulncheck ./... >$(BIN)/govulncheck.txt 2>&1; code=$$?; \
	if [ $$code = 0 ]; then echo "govulncheck: no known vulnerability is called"; \
	elif grep -q 'fetching vulnerabilities' $(BIN)/govulncheck.txt; then echo "govulncheck: skipped, its database cannot be reached from here"; \
	else cat $(BIN)/govulncheck.txt; exit $$code; fi

.PHONY: bench
bench: build ## compare the hop with nginx and HAProxy on this machine, and each engine with its limits
	$(GO) run ./bench
	$(GO) run ./bench -engines

.PHONY: bench-scale
bench-scale: ## what a cluster of 1,250 to 10,000 pods costs control, and how long changes take (PODS=5000), in 11 minutes; fails when a goal is missed
	$(GO) run ./bench/scale -check $(if $(PODS),-pods $(PODS))

.PHONY: fuzz
fuzz: ## each fuzz target for a while (FUZZTIME=10s, or a count: 2000x)
	@test/fuzz.sh $(or $(FUZZTIME),10s)

.PHONY: generate
generate: $(TOOLS)/protoc-gen-go $(TOOLS)/protoc-gen-go-grpc ## the gRPC code from api/assay.proto (needs protoc)
	PATH=$(TOOLS):$$PATH protoc -I api --go_out=api --go_opt=paths=source_relative \
		--go-grpc_out=api --go-grpc_opt=paths=source_relative api/assay.proto

.PHONY: chart
chart: $(TOOLS)/helm ## what is generated for Kubernetes (go generate), and the Helm chart's tests
	$(GO) generate ./kube/install
	$(GO) test ./kube/install

.PHONY: clean
clean: ## remove bin/
	rm -rf $(BIN)

# Helm has a go.mod of its own: it is large, and nothing else needs it.
$(TOOLS)/helm: tools/helm/go.mod
	@mkdir -p $(TOOLS)
	cd tools/helm && GOBIN=$(TOOLS) $(GO) install tool
	@touch $@

$(TOOLS)/%: tools/go.mod
	@mkdir -p $(TOOLS)
	cd tools && GOBIN=$(TOOLS) $(GO) install tool
	@touch $(TOOLS)/*
