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

{{- /* whether control is replaced one pod after the other, and has no volume */}}
{{- define "assay.several" -}}
{{- if and .Values.storeSecret (or (gt (int .Values.replicas) 1) (eq .Values.volume "emptyDir")) }}yes{{- end }}
{{- end }}

{{- /* refuses what would be two meshes, or a control that never starts */}}
{{- define "assay.validate" -}}
{{- if and (gt (int .Values.replicas) 1) (not .Values.storeSecret) }}
{{- fail "replicas: the embedded store is one control's alone: name a Secret with the URL of a PostgreSQL store in storeSecret, or one replica" }}
{{- end }}
{{- if not (or .Values.agent .Values.injector) }}
{{- fail "agent: without agents nothing would ever be meshed, unless pods have sidecars: injector" }}
{{- end }}
{{- if and .Values.serviceMonitor (not .Values.agent) }}
{{- fail "serviceMonitor: it finds the metrics of agents, and there are none" }}
{{- end }}
{{- if and .Values.serviceMonitor (lt (int .Values.metricsPort) 0) }}
{{- fail "serviceMonitor: there are no metrics without metricsPort" }}
{{- end }}
{{- if and (gt (int .Values.sidecarMetricsPort) 0) (not .Values.injector) }}
{{- fail "sidecarMetricsPort: no pod gets a sidecar without injector" }}
{{- end }}
{{- if and .Values.podMonitor (eq (int .Values.sidecarMetricsPort) 0) }}
{{- fail "podMonitor: it finds the metrics of sidecars, and there are none without sidecarMetricsPort" }}
{{- end }}
{{- /* what is in the cluster; nothing is, for helm template */}}
{{- if include "assay.several" . }}
{{- $claim := lookup "v1" "PersistentVolumeClaim" .Release.Namespace "assay-control" }}
{{- $key := lookup "v1" "Secret" .Release.Namespace "assay-authority" }}
{{- if and $claim (not (get $key "data")) }}
{{- fail "replicas, volume: the mesh's authority is in the volume of persistentvolumeclaim/assay-control, and not in the store yet: upgrade with storeSecret, one replica and volume=claim first, which puts it there; or delete the claim, if that mesh is over" }}
{{- end }}
{{- end }}
{{- if not .Values.agent }}
{{- $agents := lookup "apps/v1" "DaemonSet" .Release.Namespace "assay-agent" }}
{{- if and $agents (not (dig "spec" "template" "spec" "nodeSelector" "assay.dev/uninstalled" "" $agents)) }}
{{- fail "agent: there are agents, and only they take their pods, and the network plugin on their nodes, out of the mesh: assay uninstall --nodes-only first" }}
{{- end }}
{{- end }}
{{- if or (eq .Release.Namespace "default") (hasPrefix "kube-" .Release.Namespace) }}
{{- fail "the mesh needs a namespace of its own: its agents are privileged, and none of its pods is meshed: helm install -n assay-system" }}
{{- end }}
{{- end }}
