{{- /* labels of a component's objects: include "assay.labels" "agent" */}}
{{- define "assay.labels" -}}
app.kubernetes.io/component: {{ . }}
app.kubernetes.io/name: assay
app.kubernetes.io/part-of: assay
{{- end }}

{{- /* what finds a component's pods; it cannot be changed in an upgrade */}}
{{- define "assay.selector" -}}
app.kubernetes.io/component: {{ . }}
app.kubernetes.io/name: assay
{{- end }}

{{- define "assay.pull" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
{{- range . }}
- name: {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{- define "assay.image" -}}
image: {{ required "image is needed: build one as docs/kubernetes.md tells, and name it with --set image=…" .Values.image | quote }}
imagePullPolicy: {{ .Values.imagePullPolicy }}
{{- end }}

{{- /* refuses what would be two meshes, or a control that never starts */}}
{{- define "assay.validate" -}}
{{- if gt (int .Values.replicas) 1 }}
{{- if .Values.storeSecret }}
{{- fail "replicas: the store can be shared, the authority's keys on control's volume cannot yet: one replica" }}
{{- end }}
{{- fail "replicas: the embedded store is one control's alone: one replica" }}
{{- end }}
{{- if and .Values.serviceMonitor (lt (int .Values.metricsPort) 0) }}
{{- fail "serviceMonitor: there are no metrics without metricsPort" }}
{{- end }}
{{- if or (eq .Release.Namespace "default") (hasPrefix "kube-" .Release.Namespace) }}
{{- fail "the mesh needs a namespace of its own: its agents are privileged, and none of its pods is meshed: helm install -n assay-system" }}
{{- end }}
{{- end }}
